"""Join evaluations: python report.py FOLDER... [--to FOLDER] [--long]"""

import sys

from kvsmith.pipeline.report.join import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
