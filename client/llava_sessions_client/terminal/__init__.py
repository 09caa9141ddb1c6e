"""`llava-chat`: a picture chat in the terminal."""
