"""What can be learnt: each module is a `train.loop.Task`."""
