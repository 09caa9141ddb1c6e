"""What `llava-deploy` does on AWS, one file an errand: images, models, stacks, chats, logs. Speaks boto3 and the wire
protocol; knows nothing of the handler. Nothing here prints results or exits, save `command`.
"""
