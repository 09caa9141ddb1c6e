"""A SageMaker endpoint on this machine: TorchServe instances behind a server with the API of SageMaker Runtime.

boto3 and the AWS CLI run against it unmodified and without an account. `contract` names headers, forms and limits,
`faults` the errors, `calls` the calls and replies, `pins` the instance of each session, `routing` the routing
strategies, `selection` the instance of a call, `container_client` the traffic with the instances, `service` the
platform, `openai_path` the OpenAI-compatible path, `eventstream` the frames of a streamed reply, `app` the HTTP server,
`command` the command line, and `scrape` a reader of the instances' metrics. If AWS has not documented how the platform
behaves, a switch of `Corners` chooses.
"""
