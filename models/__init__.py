"""The networks, their losses, checkpoints and inference graph, in torch; nothing here knows of shards or Prefect."""
