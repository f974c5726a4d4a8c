"""Settings that every test shares."""

import os

import torch

if os.environ.get("PYTEST_XDIST_WORKER"):  # the workers share the cores
    torch.set_num_threads(1)
