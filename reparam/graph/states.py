"""The state of random generators and arrays, as bytes or tensors that can be compared and put back."""

import pickle
import random
from typing import Any, Final

import numpy as np
import torch

STATEFUL: Final = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.ndarray)


def has_state(value: Any) -> bool:
    """Whether a value is one of these."""
    return isinstance(value, STATEFUL) and not (isinstance(value, np.ndarray) and value.dtype.hasobject)


def state_of(value: Any) -> Any:
    """The state of a generator or array."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, random.Random):
        return value.getstate()
    return pickle.dumps(_bits(value).state)


def put_back(value: Any, state: Any) -> None:
    """Give a generator or array the state that it had."""
    if isinstance(value, torch.Generator):
        value.set_state(state)
    elif isinstance(value, np.ndarray):
        value[...] = np.frombuffer(state, value.dtype).reshape(value.shape)
    elif isinstance(value, random.Random):
        value.setstate(state)
    else:
        _bits(value).state = pickle.loads(state)


def _bits(value: Any) -> Any:
    return value.bit_generator if isinstance(value, np.random.Generator) else value._bit_generator
