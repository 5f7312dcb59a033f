"""Models from and to other projects' files: ``lwm import`` and ``lwm export``."""
