"""lwm_core: the interfaces, registry, configuration and run loop that LWM's plugins meet in.

Public names are exported by their rooms (``lwm_core.batch``, ``lwm_core.layout``, ...), each once. Importing this
package loads nothing; it never imports jax, torch, flax or a plugin.
"""

__version__ = "0.1.0"
