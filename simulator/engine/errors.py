"""The two ways in which a Metal source can fail."""


class CompileError(Exception):
    """The source is not valid Metal: the message holds diagnostics with file:line."""


class KernelError(Exception):
    """A launch was refused, or the kernel did something wrong.

    ``reports`` holds one line for each fault, with file:line, thread and threadgroup.
    """

    def __init__(self, reports: list[str] | str):
        self.reports = [reports] if isinstance(reports, str) else list(reports)
        super().__init__("\n".join(self.reports))
