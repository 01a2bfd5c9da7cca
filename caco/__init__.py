"""caco: cooperative-adversarial contrastive learning (arXiv 2203.14370)."""

from caco import installed, instructions

instructions.apply()  # before anything imports torch
__version__ = installed.version()


def load(run=None, **chosen):
    """A trained backbone and its preprocessing: `backbone, preprocess = caco.load("runs/caco/NAME")`; see
    caco.library.load.
    """
    from caco import library  # here and not above: it imports torch

    return library.load(run, **chosen)
