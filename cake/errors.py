"""The errors that Cake raises on purpose.

The message of a `CakeError` is one line for the person in front of the terminal: what is wrong and
what to do. The technical cause is chained (`raise ... from error`) and shown by `--debug`.
"""


class CakeError(Exception):
    """Anything a person can cause or mend; ends a command with one line and exit code 2."""


class TopologyError(CakeError):
    """The topology file is malformed or does not fit the model."""


class CheckpointError(CakeError):
    """A model on disk or on the hub is missing, damaged or not supported."""


class PromptTooLongError(CakeError):
    """A prompt does not fit into the context."""


class GrammarError(CakeError):
    """A schema or grammar that no answer can be held to."""


class SetupError(CakeError):
    """Only whoever runs the machines can mend it, whatever is asked of them."""


class NodeError(CakeError):
    """A worker cannot be reached, or is not the worker that the topology promises."""


class NodeLostError(NodeError):
    """A worker that served, or a worker's way to another, is there no more; what it held is lost."""


class ProtocolError(CakeError):
    """The peer sent something that the protocol does not allow; the connection is over."""


class ClusterKeyError(ProtocolError):
    """The two ends of a connection do not prove the same cluster key."""


class SessionLostError(CakeError):
    """A stage holds fewer of a session's tokens than `forward` builds on.

    The one who holds the token ids (the master) runs them again; see rule 2 in `cake.stage`.
    """

    def __init__(self, session: object, held: int) -> None:
        super().__init__(f"session {session}: the stage holds only its first {held} tokens")
        self.session = session
        self.held = held
