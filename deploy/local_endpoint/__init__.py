"""A SageMaker endpoint on this machine: TorchServe instances behind a server with the API of SageMaker Runtime.

boto3 and the AWS CLI run against it unmodified and without an account. `contract` names headers, forms and limits,
`faults` the errors, `calls` the calls and replies, `pins` the instance of each session, `container_client` the traffic
with the instances, `service` the platform, `eventstream` the frames of a streamed reply, `openai_chat` the OpenAI
route, `app` the HTTP server, and `command` the command line. If AWS has not documented how the platform behaves, a
switch of `Corners` chooses.
"""
