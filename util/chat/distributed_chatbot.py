"""A chatbot whose model is split over several processes: rank 0 talks to the user, the others run the same steps."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from lavin.runtime.errors import UserError
from util.chat.chatbot import Answer, Chatbot

NEXT, END = "next", "end"  # messages from rank 0; any other message is a question, as the arguments of `steps`


class DistributedChatbot(Chatbot):
    """Rank 0 answers questions inside `leading`; the other ranks call `follow`."""

    def __init__(self, *args):
        super().__init__(*args)
        # gloo: the wait for the next question, which may be long, does not occupy the GPU
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=365))

    def broadcast(self, message=None):
        """Returns rank 0's message on every rank."""
        objects = [message]
        dist.broadcast_object_list(objects, 0, self.group)
        return objects[0]

    def steps(self, *question) -> Iterator[Answer]:
        self.broadcast(question)
        for answer in super().steps(*question):
            yield answer
            self.broadcast(NEXT)

    @contextmanager
    def leading(self):
        try:
            yield
        finally:
            self.broadcast(END)

    def follow(self) -> None:
        """Runs the same steps as rank 0 until it ends; user errors are left to rank 0, which reports them."""
        steps: Iterator[Answer] = iter(())
        while (message := self.broadcast()) != END:
            if message != NEXT:
                steps = super().steps(*message)
            with suppress(UserError):
                next(steps, None)
