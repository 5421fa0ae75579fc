"""What horovod.tensorflow.keras is to horovod.keras: the same under another name."""

import sys

import hvd_backup.keras

sys.modules[__name__] = hvd_backup.keras
