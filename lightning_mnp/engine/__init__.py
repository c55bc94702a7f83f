"""The resumable state machine that runs an audit or a defense."""
