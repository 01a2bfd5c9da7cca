"""caco: cooperative-adversarial contrastive learning (arXiv 2203.14370)."""

from caco import installed, instructions

installed.require_the_basics()
instructions.apply()  # must come before anything imports torch
__version__ = installed.version()


def load(run=None, **chosen):
    """A trained backbone and its preprocessing: `backbone, preprocess = caco.load("runs/caco/NAME")`. For the arguments
    see caco.library.load.
    """
    from caco import library  # not at the top of the file, because it imports torch

    return library.load(run, **chosen)
