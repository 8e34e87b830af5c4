"""The images: real, in LeNet-5's shape, and held out for good."""

import numpy as np

from demo import digits


def test_every_image_is_in_one_of_the_two_sets() -> None:
    (pixels, labels), (held_pixels, held_labels) = digits.training(), digits.held_out()
    assert len(labels) == len(pixels) == 1797 - 450
    assert len(held_labels) == len(held_pixels) == 450
    assert set(held_labels.tolist()) == set(range(10))


def test_no_held_out_image_is_among_the_training_images() -> None:
    trained = {image.tobytes() for image in digits.training()[0]}
    assert not any(image.tobytes() in trained for image in digits.held_out()[0])


def test_images_have_the_shape_and_the_range_of_the_model_s_input() -> None:
    pixels, _ = digits.held_out()
    assert pixels.shape[1:] == (1, 28, 28)
    assert pixels.dtype == np.float32
    assert pixels.min() == 0.0
    assert pixels.max() == 1.0


def test_enlarging_repeats_pixels_and_rounds_nothing() -> None:
    image = np.arange(64, dtype=np.float64).reshape(1, 8, 8) % 17
    enlarged = digits.enlarge(image)
    assert enlarged.shape == (1, 1, 28, 28)
    assert np.array_equal(enlarged[0, 0, 3:26:3, 3:26:3] * 16, image[0])
    assert enlarged.sum() * 16 == image.sum() * 9
