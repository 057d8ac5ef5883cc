"""One step of the selective scan, for decoding: constant memory, constant time."""
