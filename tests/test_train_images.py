"""Images of the training example: the same order and the same crops, wherever a training goes on."""

import itertools
from pathlib import Path

import pytest
import torch
from digit_folder import write_digits

from common import InputError
from training import images
from training.processes import Processes

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)


def drawn(rank: int = 0, count: int = 1, epoch: int = 0, start: int = 0, seed: int = 3) -> list[list[images.Drawn]]:
    batches = images.Batches(50, 12, seed, Processes(rank, count, CPU))
    batches.epoch, batches.start = epoch, start
    return list(batches)


class TestOrder:
    def test_an_epoch_is_a_permutation_without_its_rest(self) -> None:
        numbers = [index for batch in drawn() for index, _ in batch]
        assert len(numbers) == len(set(numbers)) == 48
        assert set(numbers) <= set(range(50))
        assert numbers != sorted(numbers)

    def test_epochs_and_seeds_differ(self) -> None:
        orders = [drawn(), drawn(epoch=1), drawn(seed=4)]
        assert all(one != other for one, other in itertools.combinations(orders, 2))
        seeds = [dict(itertools.chain(*order)) for order in orders]
        for one, other in itertools.combinations(seeds, 2):
            assert all(one[index] != other[index] for index in one.keys() & other.keys())

    @pytest.mark.parametrize("start", [0, 1, 3, 4])
    def test_it_goes_on_from_any_position(self, start: int) -> None:
        assert drawn(epoch=2, start=start) == drawn(epoch=2)[start:]

    @pytest.mark.parametrize("count", [2, 3, 4])
    def test_processes_share_each_batch(self, count: int) -> None:
        each = [drawn(rank, count) for rank in range(count)]
        assert [list(itertools.chain(*parts)) for parts in zip(*each, strict=True)] == drawn()

    def test_a_batch_that_does_not_divide_is_refused(self) -> None:
        with pytest.raises(InputError, match="all 5 processes together and must be a multiple of 5"):
            drawn(count=5)

    def test_crops_depend_on_nothing_but_the_seed(self, tmp_path: Path) -> None:
        recipe = images.Recipe(16, auto_augment="randaugment")
        seen = []
        for workers in (0, 2):
            torch.manual_seed(workers)
            data = images.load(write_digits(tmp_path), recipe, 160, seed=0, workers=workers, processes=ALONE)
            before = torch.get_rng_state()
            data.batches.epoch = 1
            seen.append([batch for batch, _ in data.training])
            assert torch.equal(before, torch.get_rng_state()), "a training step would draw other numbers"
        assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))

    def test_splits_need_the_same_classes(self, tmp_path: Path) -> None:
        (write_digits(tmp_path) / "val" / "9").rename(tmp_path / "val" / "nine")
        with pytest.raises(InputError, match="need the same classes; only one has 9 or nine"):
            images.load(tmp_path, images.Recipe(16), 8, 0, 0, ALONE)

    def test_missing_and_empty_folders_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"train is not a folder; --data takes a folder that holds train/CLASS"):
            images.load(tmp_path / "none", images.Recipe(16), 8, 0, 0, ALONE)
        (write_digits(tmp_path) / "train" / "empty").mkdir()
        with pytest.raises(InputError, match=r"empty.*every class needs images"):
            images.load(tmp_path, images.Recipe(16), 8, 0, 0, ALONE)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_broken_image_is_named(self, tmp_path: Path, workers: int) -> None:
        broken = write_digits(tmp_path) / "val" / "0" / "0.png"
        broken.write_bytes(b"no image")
        data = images.load(tmp_path, images.Recipe(16), 8, 0, workers, ALONE)
        with pytest.raises(InputError, match=r"0\.png is not a readable image .* repair or remove it"):
            list(data.validation)
