"""How the processes of a training share a step: their ranks, gradients summed in one order, sharded models."""
