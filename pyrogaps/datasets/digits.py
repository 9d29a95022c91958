"""scikit-learn's handwritten digits."""

import numpy as np

from pyrogaps.datasets.images import GreyImages, ImageData

# The split into training and test digits is part of the data set's definition and never changes.
SHUFFLE, NUM_TEST = 0, 397


class Digits(ImageData):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: 1,400 for training, 397 for testing; no files needed.

    scikit-learn sorts them by writer and has no test set, so they are shuffled in a fixed order.

    >>> digits = Digits(num_validation=200, num_test=100)
    >>> digits.train.shape, digits.validation.shape, digits.test.shape
    (torch.Size([1200, 8, 8]), torch.Size([200, 8, 8]), torch.Size([100, 8, 8]))
    """

    def read(self) -> GreyImages:
        from sklearn.datasets import load_digits  # takes a second to import

        grey = load_digits().images / 16.0
        shuffled = grey[np.random.RandomState(SHUFFLE).permutation(len(grey))]
        return GreyImages(shuffled[:-NUM_TEST], shuffled[-NUM_TEST:])
