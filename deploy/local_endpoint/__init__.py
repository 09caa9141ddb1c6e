"""A SageMaker endpoint on this machine: TorchServe instances behind a front that speaks SageMaker Runtime.

For trying the client side without an account: boto3 and the AWS CLI run against it unmodified. `contract` has the
words of the wire, `faults` its errors, `pins` which session belongs to which instance, `platform` what the service
does with a call, `eventstream` the frames of a streamed answer, `openai_chat` the OpenAI route, `app` the HTTP side,
and `__main__` the command. Where nobody outside AWS knows what the real platform does, a switch (`Corners`) chooses.
"""
