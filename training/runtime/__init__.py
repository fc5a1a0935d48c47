"""What training of any kind needs: processes, interrupts, work ahead, states, logs, places to write to."""
