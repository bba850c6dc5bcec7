"""Filled slots in, tensors on the device out, without making the host wait.

device.py     everything that a device is asked to do
upload.py     the stream protocol: copies, kernel, events
outputs.py    the tensors that the kernel writes;  executor.py  which kernel
prefetcher.py copies ahead of time and delivers in order
"""

from nanopack.upload.device import Device, open_device
from nanopack.upload.executor import make_kernel
from nanopack.upload.outputs import Outputs, outputs_maker
from nanopack.upload.prefetcher import Prefetcher
from nanopack.upload.upload import Upload

__all__ = ["Device", "Outputs", "Prefetcher", "Upload", "make_kernel", "open_device", "outputs_maker"]
