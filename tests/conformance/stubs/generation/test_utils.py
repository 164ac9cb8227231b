"""Left out of the source distribution."""


class GenerationTesterMixin:
    pass
