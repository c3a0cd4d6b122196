"""What a training loop needs beside a model.

`sample_stream` gives samples in an order that no topology changes. `loss_monitor` stops a run that diverges. `watchdog` ends a
job in which a rank died or hangs. It reads where ranks are (`stack_location`), asks them through the store of the process group
(`store_client`), and says who holds up the job (`verdict`).
"""
