"""Where tokens come from: a Markov chain whose law is known, or real text, split by position into three parts.

A source has the members of `Source`, and may have `law(contexts [..., order]) -> [..., V]`: training and race ask for no more,
so an object of your own with these works too.
"""

from xentlab.sources.markov import MarkovSource
from xentlab.sources.source import PARTS, Source, checked_source, identity
from xentlab.sources.text import Text, builtin_text, read_text

__all__ = ["PARTS", "MarkovSource", "Source", "Text", "builtin_text", "checked_source", "identity", "read_text"]
