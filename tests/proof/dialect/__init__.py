"""Whether the shaders speak Apple's dialect of C++, as far as that can be told without Apple's
compiler: rules of the language, and nothing outside of what PyTorch's own Metal sources use.

>>> findings = check(source, instantiations)
"""

from .rules import Finding, check

__all__ = ["Finding", "check"]
