"""What runs the graph. Offline by promise, so onnxruntime's telemetry is off before anything imports onnxruntime.

From 1.29 on its Linux wheels send events to their maker by default and keep a device id below ~/.cache; this variable
keeps uploader, events and id from being created. Later calls of its API could not: the first event is sent at import.
"""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
