"""What nodes and training both do with files of others: videos read as they are shown, and written with sound."""
