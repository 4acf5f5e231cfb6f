"""What a run needs besides data and models: flags, folder, checkpoint, processes, guard, signals, learning rate."""
