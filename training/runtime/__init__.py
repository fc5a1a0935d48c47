"""What any training needs: processes, interrupts, read-ahead, the trainer and its state file, logs, output paths."""
