"""A molecule as RDKit draws it, as paths and coordinates for a drawing of ours."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Chem import rdCoordGen, rdDepictor
from rdkit.Chem.Draw import rdMolDraw2D

from atomas.interpretation.smiles_atoms import in_string_order

BOND_POINTS = 24.0
"""Length of a bond where there is room."""
_BOND_ANGSTROM = 1.5
_PADDING = 14.0
_MACROCYCLE = 9
"""Atoms of a ring that RDKit draws as a circle, bending smaller rings on it out of shape."""

Commands = list[tuple[str, list[tuple[float, float]]]]
"""SVG path commands M, L, Q, C and Z, with absolute points"""


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a path is drawn: filled (letters, wedges), or as a line of a width and dashes."""

    fill: bool
    width: float
    dash: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Stroke:
    """A path and its look."""

    commands: Commands
    look: Look


@dataclass(frozen=True, kw_only=True)
class Depiction:
    """A drawing in points, from its upper left corner, y downwards. Atoms are in the order of the SMILES."""

    width: float
    height: float
    bond: float
    """Length of a bond"""
    atoms: NDArray[np.float64]
    """[atoms, 2]"""
    strokes: list[Stroke]


def depict(smiles: str, *, max_width: float, max_height: float) -> Depiction:
    """Draw in black, at most so large; InvalidMoleculeError where RDKit refuses `smiles`."""
    molecule = rdMolDraw2D.PrepareMolForDrawing(in_string_order(smiles), addChiralHs=False)
    _lay_out(molecule)
    rdDepictor.NormalizeDepiction(molecule)
    rdDepictor.StraightenDepiction(molecule)
    positions = molecule.GetConformer().GetPositions()[:, :2]
    extent = np.maximum(np.ptp(positions, axis=0), _BOND_ANGSTROM)
    room = np.array([max_width, max_height]) - 2 * _PADDING
    scale = min(BOND_POINTS / _BOND_ANGSTROM, *(room / extent))
    return _draw(molecule, scale)


def _lay_out(molecule: Chem.Mol) -> None:
    """2D coordinates, of CoordGen for macrocycles; a molecule that it gives up has atoms in one place."""
    if any(len(ring) >= _MACROCYCLE for ring in molecule.GetRingInfo().AtomRings()):
        rdCoordGen.AddCoords(molecule)
        positions = molecule.GetConformer().GetPositions()
        if len(np.unique(positions.round(2), axis=0)) == len(positions):
            return
    rdDepictor.Compute2DCoords(molecule)


def _draw(molecule: Chem.Mol, scale: float) -> Depiction:
    canvas = rdMolDraw2D.MolDraw2DSVG(-1, -1)
    options: Any = canvas.drawOptions()
    options.useBWAtomPalette()
    options.clearBackground = False
    options.scalingFactor = scale
    options.bondLineWidth = max(0.5, min(1.3, 0.08 * scale))
    options.scaleBondWidth = False
    options.minFontSize = 4
    options.maxFontSize = 12
    options.padding = 0.0
    options.fixedScale = -1.0
    options.prepareMolsBeforeDrawing = False
    canvas.DrawMolecule(molecule)
    canvas.FinishDrawing()
    points = [canvas.GetDrawCoords(atom) for atom in range(molecule.GetNumAtoms())]
    return Depiction(
        width=canvas.Width() + 2 * _PADDING,
        height=canvas.Height() + 2 * _PADDING,
        bond=scale * _BOND_ANGSTROM,
        atoms=np.array([(point.x, point.y) for point in points]).reshape(-1, 2) + _PADDING,
        strokes=list(_strokes(canvas.GetDrawingText())),
    )


def _strokes(svg: str) -> Iterator[Stroke]:
    for element in ElementTree.fromstring(svg.encode("iso-8859-1")).iter("{http://www.w3.org/2000/svg}path"):
        style = dict(part.split(":") for part in element.get("style", "").split(";") if ":" in part)
        fill = style.get("fill", element.get("fill", "none"))
        yield Stroke(
            commands=list(_commands(element.get("d", ""))),
            look=Look(
                fill=fill != "none",
                width=float(style.get("stroke-width", "0").removesuffix("px")),
                dash=tuple(float(part) for part in re.findall(r"[\d.]+", style.get("stroke-dasharray", ""))),
            ),
        )


def _commands(path: str) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    for letter, rest in re.findall(r"([MLQCZ])([^MLQCZ]*)", path):
        numbers = [float(number) + _PADDING for number in re.findall(r"-?\d+(?:\.\d+)?", rest)]
        yield letter, list(zip(numbers[::2], numbers[1::2], strict=True))
