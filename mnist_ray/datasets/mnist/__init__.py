"""The four files of MNIST, compressed; README.md beside this file tells where they come from."""
