"""The container's image, built and run for real (`make image-test`)."""
