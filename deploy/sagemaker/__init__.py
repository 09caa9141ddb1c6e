"""Deploy on Amazon SageMaker: push the image, upload the model, make and watch the endpoint (`llava-deploy`).

Uses boto3 and the wire protocol. `command` is the command line; the other modules return results and raise
`DeployError`, and neither print results nor exit.
"""
