"""Pictures of clips, masks and features."""
