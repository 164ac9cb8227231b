"""Left out of the source distribution."""


class ExportTesterMixin:
    pass
