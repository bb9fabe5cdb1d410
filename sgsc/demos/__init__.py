"""Data that is always there, small networks for it and a float trainer: what the main job is shown on."""

from sgsc import artefact

from .models import ARCHITECTURES as ARCHITECTURES
from .tasks import TASKS as TASKS
from .tasks import Task as Task
from .tasks import load as load
from .training import accuracy as accuracy
from .training import batches as batches
from .training import evaluate as evaluate
from .training import samples_of as samples_of
from .training import train as train

artefact.ARCHITECTURES.update(ARCHITECTURES)  # so that `sgsc.load` can build them
