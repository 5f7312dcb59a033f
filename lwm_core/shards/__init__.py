"""Codes of pictures and videos on disk, as ``lwm encode`` writes them: read at any (video, frame), without an encoder.

What writes them is the vision encoder's plugin; what reads them is many: training data, evaluations, ``lwm decode``.
"""

from lwm_core.shards.layout import Manifest, Settings, Shard, Video
from lwm_core.shards.reader import Shards, open_shards

__all__ = ["Manifest", "Settings", "Shard", "Shards", "Video", "open_shards"]
