"""Rotary positions: products of rotated queries and keys depend on differences of places only, and
lengths stay.
"""

import torch

from sfumato.nn.rotary import apply_rotary, rotary_angles


def test_products_depend_on_differences_of_places() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(16, generator=generator, dtype=torch.float64) for _ in range(2))
    places = rotary_angles(5, 7, 16, like=torch.empty(0)).double()

    def product(a: tuple[int, int], b: tuple[int, int]) -> float:
        turned = [
            apply_rotary(x.expand(1, 1, 1, -1), places[row * 7 + column][None])[0, 0, 0]
            for x, (row, column) in ((q, a), (k, b))
        ]
        return float(turned[0] @ turned[1])

    assert abs(product((1, 2), (3, 5)) - product((0, 1), (2, 4))) < 1e-6
    assert abs(product((1, 2), (3, 5)) - product((1, 2), (3, 4))) > 1e-3
    assert abs(product((1, 2), (3, 5)) - product((1, 2), (2, 5))) > 1e-3
    assert abs(product((2, 3), (2, 3)) - float(q @ k)) < 1e-6


def test_rotation_is_the_complex_product() -> None:
    generator = torch.Generator().manual_seed(0)
    x, turn = (
        torch.randn(2, 3, 35, 16, generator=generator),
        rotary_angles(5, 7, 16, like=torch.empty(0)),
    )
    numbers = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(turn), turn)
    assert torch.allclose(
        apply_rotary(x, turn), torch.cat([numbers.real, numbers.imag], dim=-1), atol=1e-6
    )
    assert torch.allclose(apply_rotary(x, turn).norm(dim=-1), x.norm(dim=-1), atol=1e-5)


def test_places_are_counted_from_the_middle() -> None:
    places = rotary_angles(3, 5, 8, like=torch.empty(0)).unflatten(0, (3, 5))
    assert places[1, 2].abs().max() == 0
    assert torch.allclose(places, -places.flip(0, 1))
    # rows; columns are the other half
    assert (places[0, :, :2] == -1 * torch.tensor([1.0, 0.1])).all()
