"""A callback that stops a run in the middle, as Ctrl-C would."""


class Stop(Exception):
    pass


class StopAt:
    def __init__(self, step):
        self.step = step

    def on_step_end(self, step, losses):
        if step == self.step:
            raise Stop
