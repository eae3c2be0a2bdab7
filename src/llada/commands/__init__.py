"""One thin file per `llada` command."""
