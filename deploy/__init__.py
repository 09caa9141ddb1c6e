"""Pack, serve and deploy the model archive. Uses the handler over HTTP only."""
