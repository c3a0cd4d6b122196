"""What a training loop needs beside a model: its samples in order, a watchdog, and a monitor of the loss."""
