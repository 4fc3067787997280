"""One scoring run in the processes of a torch.distributed group. A run of one process imports nothing from here."""
