"""Readable names of the papers that methods cite."""

from __future__ import annotations

_PAPERS = {
    "arras2016explaining": "Arras et al. 2016",
    "bach2015pixel": "Bach et al. 2015",
    "brinner2023model": "Brinner & Zarriess 2023",
    "enguehard2023sequential": "Enguehard 2023",
    "lundberg2017unified": "Lundberg & Lee 2017",
    "ribeiro2016should": "Ribeiro et al. 2016",
    "roy2024uniform": "Sinha Roy & Kundu 2024",
    "sanyal2021discretized": "Sanyal & Ren 2021",
    "shrikumar2016not": "Shrikumar et al. 2016",
    "shrikumar2017learning": "Shrikumar et al. 2017",
    "smilkov2017smoothgrad": "Smilkov et al. 2017",
    "strumbelj2010efficient": "Strumbelj & Kononenko 2010",
    "sundararajan2017axiomatic": "Sundararajan et al. 2017",
    "zeiler2014visualizing": "Zeiler & Fergus 2014",
    "zhang2022locally": "Zhang et al. 2022",
    "none": "",
}


def name_paper(key: str) -> str:
    """Return a paper as people cite it; a key that is not known here, as a plug-in's, as it stands."""
    return _PAPERS.get(key, key)
