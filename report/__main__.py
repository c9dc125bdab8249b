"""Prints the evaluations in a workdir as a table and draws the FID against NFE: python -m report WORKDIR

Reads the last step of each <eval_folder>/step_<step>/metrics.json. --html also writes WORKDIR/report.html, a page with
all that was measured and how, and its pictures into WORKDIR/report/. With --check it also prints the ratios of
k-SeqRF's numbers to 1-RF's at k network calls; the exit status is 1 if one is larger than the quickstart's bound.
"""

import argparse
import sys

import utils
from report import results
from report.results import markdown_table


def main() -> int:
    """The script: prints the table, writes it to report.md, draws the FID beside it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=utils.local_path)
    parser.add_argument("--html", action="store_true", help="also write report.html")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a ratio is larger than its bound")
    options = parser.parse_args()
    workdir, found = options.workdir, results.read(options.workdir)
    if not found.steps:
        sys.exit(f"error: no <eval_folder>/step_<step>/metrics.json in {workdir}; run main.py --mode=eval first")
    from report import page

    table = markdown_table(found.rows, aligned=True)
    print(table)
    (workdir / "report.md").write_text(table + "\n")
    page.draw_fid(workdir / "fid_against_nfe.png", found)
    print(f"\nfigure: {workdir / 'fid_against_nfe.png'}")
    if options.html:
        print(f"report: {page.write(workdir, found)}")
    if not options.check:
        return 0
    print("", *found.claims, sep="\n")
    return int(not all(claim.holds for claim in found.claims))


if __name__ == "__main__":
    sys.exit(main())
