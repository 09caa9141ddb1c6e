"""Build the model archive: check a LLaVA checkpoint, render its configuration, archive it with the handler."""
