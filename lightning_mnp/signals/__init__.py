"""What speaks for a backdoor: one module a signal, and the verdict."""

from lightning_mnp.signals.base import Scene, Search, SignalSearch
from lightning_mnp.signals.registry import register, registered, unregister
from lightning_mnp.signals.trace import Trace

__all__ = ["Scene", "Search", "SignalSearch", "Trace", "register", "registered", "unregister"]
