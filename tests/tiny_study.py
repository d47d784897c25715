"""The smallest study that has all parts of a large one."""

from ntk_lazy.study.config import StudyConfig

TINY = StudyConfig(
    image="analytic",
    num_points=150,
    num_test_points=60,
    num_layers=3,
    width=16,
    steps=120,
    halvings=(80,),
    num_pairs=30,
    num_pictures=2,
    snapshots=(0, 10, 40, 79, 100, 120),
)
