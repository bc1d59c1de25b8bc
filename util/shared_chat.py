"""A chatbot whose model several processes share: the first one talks, the others take each of its steps with it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from lavin.errors import UserError
from util.chat import Answer, Chatbot

NEXT, END = "next", "end"


class SharedChatbot(Chatbot):
    """Used by the first process, inside `leading`; the others `follow`."""

    def __init__(self, *args):
        super().__init__(*args)
        # gloo: waiting for a question costs no GPU time, however long it takes
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=365))

    def share(self, message=None):
        """The first process's message, on every process."""
        box = [message]
        dist.broadcast_object_list(box, 0, self.group)
        return box[0]

    def steps(self, *asked) -> Iterator[Answer]:
        self.share(asked)
        for answer in super().steps(*asked):
            yield answer
            self.share(NEXT)

    @contextmanager
    def leading(self):
        try:
            yield
        finally:
            self.share(END)

    def follow(self) -> None:
        """Answers along until the first process ends; what that one tells its user is left to it."""
        steps = iter(())
        while (message := self.share()) != END:
            if message != NEXT:
                steps = super().steps(*message)
            with suppress(UserError):
                next(steps, None)
