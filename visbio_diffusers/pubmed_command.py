"""What `visbio data pubmed` takes and does."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


HELP = """\
Write abstracts of PubMed, or figure captions of PMC articles, as JSON lines.

  visbio data pubmed --query "eosinophils[mesh] AND 2020:2024[dp]" --email you@example.org --output abstracts.jsonl
  visbio data pubmed pubmed26n0001.xml.gz pubmed26n1335.xml.gz --output abstracts.jsonl
  visbio data pubmed article.nxml --output figures.jsonl

Files are PubMed XML (.xml, .xml.gz), MEDLINE text (.txt, .nbib) or PMC articles (.nxml). A fetch that was interrupted
goes on where it stopped when the same command is given again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="FILE", help="files to convert, unless --query is given")
    add("--query", help="what PubMed shall look for, in its own language")
    add("--email", help="yours: NCBI asks for it")
    add("--output", type=Path, required=True, help="the JSON lines, .jsonl")
    add("--max-results", "--max_results", type=int, help="keep the first so many of PubMed's list; default: all")
    add("--api-key", "--api_key", help="for 10 requests a second instead of 3; default: the variable NCBI_API_KEY")
    add("--base-url", "--base_url", help="of the E-utilities; default: NCBI's")
    parser.set_defaults(run=run, error=parser.error)


def run(args: argparse.Namespace) -> None:
    """Convert files, or fetch what a query finds, and say how much there is."""
    if (args.query is None) == (not args.files):
        args.error("give either files or --query")
    if args.query is not None and args.email is None:
        args.error("--query needs --email: NCBI asks for yours")
    from visbio_diffusers.data import entrez
    from visbio_diffusers.data.pubmed import convert_pubmed

    if args.files:
        count = convert_pubmed(args.files, args.output)
    else:
        key, url = args.api_key or os.environ.get("NCBI_API_KEY"), args.base_url or entrez.BASE_URL
        count = entrez.fetch_pubmed(args.query, args.output, args.email, args.max_results, key, url)
    sys.stdout.write(f"{args.output}: {count} rows\n")
